"""How a model is read: flatten, annotate, find layers, cluster, and the graph of it all."""

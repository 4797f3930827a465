"""What the experiments share: arguments, data, optimizers, training, records, tables and plots."""

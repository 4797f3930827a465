"""Do the examples of a batch act alone? Else, what is it that they share?

`statistics.check_examples` is the way in. Most models tell by their operations (`separate`,
`rebatched`); others are run on values (`independence`, with `made_up`, `batch_program`, `bounded`,
`batch_noise`, `moved`). Noise and positions of the batch go along as data (`carried`), also where a
loop makes them (`ahead`).
"""

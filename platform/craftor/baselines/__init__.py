"""Ways to better images that train nothing: what tuning has to beat at equal cost.

A method is a pure function, prompts -> images: `(prompts, numbers, seed)` to images in [0, 1], row by row from
(prompt, number, seed) alone, whatever the batch. Its images are always scored against the prompts it was given.
"""

"""Top-1 accuracies on ImageNet in percent as Google published them with its weights: alpha -> resolution -> accuracy.

The source is the table of checkpoints in tensorflow/models, research/slim/nets/mobilenet/README.md. Nothing here was
measured by this project.
"""

TOP1 = {
    1.4: {224: 75.0},
    1.3: {224: 74.4},
    1.0: {224: 71.8, 192: 70.7, 160: 68.8, 128: 65.3, 96: 60.3},
    0.75: {224: 69.8, 192: 68.7, 160: 66.4, 128: 63.2, 96: 58.8},
    0.5: {224: 65.4, 192: 63.9, 160: 61.0, 128: 57.7, 96: 51.2},
    0.35: {224: 60.3, 192: 58.2, 160: 55.7, 128: 50.8, 96: 45.5},
}

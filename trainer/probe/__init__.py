"""Models and held-out text in, how fragile, how sure and how well-memorised out: `anneal probe`.

models.py        MODEL, LABEL=MODEL and MODEL@REVISION, in the order of training
loaded_model.py  one model in memory and texts to measure it on, again and again
noise.py         Gaussian noise on the weights: the loss it costs, and how that grows
noise_report.py  its table over models and strengths
answers.py       questions with choices: format, entropy, accuracy, calibration
memory.py        exact memorisation, with text that was not trained on beside it
tune.py          fine-tuning at fixed learning rates over models
"""

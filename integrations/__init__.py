"""Other trainers with our loss: their configuration, model and data set in, a step on cached teacher targets out.

`integrations.trl` and `integrations.axolotl` are imported by those who have these packages; nothing here imports them.
"""

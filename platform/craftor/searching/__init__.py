"""Searches: trials over a recipe's keys by Ray Tune, and mixtures of encoders without retraining."""

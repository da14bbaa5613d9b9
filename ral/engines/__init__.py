"""Reinforced Attention Learning inside other trainers than TRL's: one module for each."""

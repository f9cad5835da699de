"""Optimizers, the one gradient loop, and the distillation that runs in it; the only importer of
deepspeed and of cmaes.
"""

"""Imported by verl in every process; what fails here verl logs at DEBUG alone."""

from ipvrm_core.integrations.verl.engine import register_engine
from ipvrm_core.integrations.verl.trainer import register_trainer

register_engine("cuda", "nvidia")
register_trainer()

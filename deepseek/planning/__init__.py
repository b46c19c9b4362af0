"""Estimate parameters, memory and time of training and inference, without allocating anything."""

from deepseek.planning.architecture import Architecture as Architecture
from deepseek.planning.hardware import DEVICES as DEVICES
from deepseek.planning.hardware import Device as Device
from deepseek.planning.inference import InferencePlan as InferencePlan
from deepseek.planning.inference import plan_inference as plan_inference
from deepseek.planning.sizes import Shape as Shape
from deepseek.planning.training import Plan as Plan
from deepseek.planning.training import deepspeed_config as deepspeed_config
from deepseek.planning.training import plan as plan
from deepseek.planning.training import training_memory as training_memory

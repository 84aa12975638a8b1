"""The twin of a model: the same class from the same config, made small enough to really run.

A class's declarations tell what it says about its inputs; running it tells what it does with them. A 70B model
cannot be run to ask, its twin can: few layers, narrow, a small vocabulary, and the same structure. Nothing here
knows a model type. What a value of the config means is read from its key in the field's own words (`keys`) and from
equal values; whether the guess held is read from the class, which is built on the meta device, counted, and its
stacks of layers compared with those of the full model (`built`).
"""

from onnx_config.twin.ladder import PARAMETER_BUDGET, Twin, default_config, shrink, twins

__all__ = ["PARAMETER_BUDGET", "Twin", "default_config", "shrink", "twins"]

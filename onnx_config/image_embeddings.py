"""What a segmenter makes of an image once, and is then asked about as often as one likes.

Such a class has a method ``get_image_embeddings``, and its ``forward`` takes what that gives in the place of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration
    from onnx_config.probe import Probe
    from onnx_config.shape_inference import Inference

__all__ = ["EMBEDDINGS_OF_IMAGE", "IMAGE", "image_embeddings"]

EMBEDDINGS_OF_IMAGE = "image_embeddings"
"""The argument that takes them; several are called ``image_embeddings.0``, ``image_embeddings.1``, …"""

IMAGE = "pixel_values"
"""What they are made of."""

_METHOD = f"get_{EMBEDDINGS_OF_IMAGE}"


def image_embeddings(declaration: Declaration, found: Inference, probe: Probe) -> tuple[TensorSpec, ...]:
    """Return the embeddings of a batch of images, by a run on shapes alone; empty where there are none.

    Their first axis is that of the images; all others are fixed.
    """
    image = next((spec for spec in found.inputs if spec.name == IMAGE), None)
    if image is None or not hasattr(probe.model, _METHOD) or declaration.argument(EMBEDDINGS_OF_IMAGE) is None:
        return ()
    answer = probe.run({IMAGE: (image.resolve(found.sizes), image.dtype)}, method=_METHOD)
    if answer.outputs is None:
        return ()
    rows = image.resolve(found.sizes)[0]
    specs = [
        TensorSpec(
            name=EMBEDDINGS_OF_IMAGE if name == "output" else f"{EMBEDDINGS_OF_IMAGE}.{name}",
            dtype=dtype,
            shape=(image.shape[0], *shape[1:]),
        )
        for name, (shape, dtype) in answer.outputs.items()
        if shape and shape[0] == rows
    ]
    # An image of any size would have embeddings of any size.
    fixed = all(isinstance(size, int) for size in image.shape[1:])
    return tuple(specs) if fixed and len(specs) == len(answer.outputs) else ()

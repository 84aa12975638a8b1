"""What transformers does not declare, one line each with its reason. This table is a debt.

An entry that a general rule would cover does not go in; a test prints the length of each table.
"""

from __future__ import annotations

__all__ = ["ALWAYS_GIVEN", "AXIS_SYNONYMS", "CONFIG_SIZES", "pattern_count"]

AXIS_SYNONYMS: dict[str, str] = {
    # The docstrings' spellings of one axis. The right-hand side is the name in the graph.
    "bs": "batch_size",
    "batch": "batch_size",
    "n": "batch_size",
    "seq_len": "sequence_length",
    "seq_length": "sequence_length",
    "input_ids_length": "sequence_length",
    "input_sequence_length": "sequence_length",
    "source_sequence_length": "sequence_length",
    "src_len": "sequence_length",
    "text_sequence_length": "sequence_length",
    "target_sequence_length": "decoder_sequence_length",
    "target_length": "decoder_sequence_length",
    "tgt_len": "decoder_sequence_length",
    "decoder_seq_length": "decoder_sequence_length",
    "num_input_channels": "num_channels",
    "channels": "num_channels",
    "input_channels": "num_channels",
    "num_choice": "num_choices",
    "feature_dim": "feature_size",
    "num_mel_bins": "feature_size",
    "feature_length": "sequence_length",
    "audio_len": "sequence_length",
    "num_samples": "sequence_length",
}

CONFIG_SIZES: dict[str, tuple[str, ...]] = {
    # Axis -> config attributes that hold its size, first found wins. The axis's own name is always tried first.
    "num_channels": ("num_channels", "num_input_channels", "in_channels", "in_chans", "image_channels"),
    "height": ("image_size",),
    "width": ("image_size",),
    "image_size": ("image_size", "input_size"),
    "feature_size": ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_dim"),
    "num_frames": ("num_frames", "frames"),
    "num_classes": ("num_labels",),
    "num_features": ("num_time_features",),
}

ALWAYS_GIVEN: dict[str, str] = {
    # Optional arguments that no preprocessor class names, yet nobody deploys a model without.
    "bbox": "layout models place each token on the page; left out, every token stands at the origin",
    "input_points": "segmenters are asked for what lies at a point; left out, they answer for no prompt at all",
    "input_labels": "whether a point belongs to what is asked for; comes with the points",
}


def pattern_count() -> dict[str, int]:
    """Return the number of entries of each table."""
    return {
        "axis synonyms": len(AXIS_SYNONYMS),
        "config sizes": len(CONFIG_SIZES),
        "always given": len(ALWAYS_GIVEN),
    }

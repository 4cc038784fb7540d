"""A decoder of 1.24B parameters in the shape of Llama 3.2 1B, for `compax plan`: data parallel, as simple as it gets.

Claim: on v6e the step fits with all of parameters and optimizer state on every chip; on v5e it does not, and the plan
says so, and by how much, before anybody rents one.

Command: `compax plan --config=plan_1b --topology=v6e:4x4`, and again with `--topology=v5e:4x4`

The shape: Meta, "Llama 3.2", 2024: 16 layers, width 2048, 32 heads over 8 of keys and values, hidden 8192, vocabulary
128,256, tied.
"""

from __future__ import annotations

from compax.experiments import config as base


def get_config() -> base.Config:
    """Returns the config."""
    config = base.default()
    config.name = "plan_1b"
    config.pipeline = "cast(compute=bfloat16)"
    config.tokenizer.vocabulary = 128_256
    config.model.overrides = {
        "model_dim": 2048,
        "hidden_dim": 8192,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "rope_theta": 500_000.0,
        "scan": True,
        "remat": True,
    }
    config.data.sequence_length = 2048
    config.data.batch_size = 16
    config.plan.topology = "v6e:4x4"
    config.plan.mesh = "data=16"
    return config

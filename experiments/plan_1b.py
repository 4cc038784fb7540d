"""A decoder of 1.24B parameters in the shape of Llama 3.2 1B, for `compax plan`: data parallel, as simple as it gets.

Claim: on v6e the step fits with all of parameters and optimizer state on every chip (22.1 of 33.6 GB, compiled); on
v5e it needs 21.6 of 16.9 GB (compiled), the plan says so before anybody rents one, and predicts 12.3 GB with the
optimizer's state split, which the compiler then makes 10.8.

Commands:
    compax plan --config=plan_1b
    compax plan --config=plan_1b --topology=v5e:4x4
    compax plan --config=plan_1b --topology=v5e:4x4 \
        --config.sharding.optimizer="('blocks.**.kernel: -,data', 'embed.embedding: data,-')"

Measured on two cores that others used too, with libtpu 0.0.42.1, 2026-11: 145 s of processors and 1.8 GB of memory for
v6e, 86 s and 1.6 GB for the last.

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

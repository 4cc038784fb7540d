"""A decoder of 6.74B parameters in the shape of Llama 2 7B on 128 chips, for `compax plan`: FSDP by tensor parallel.

Claim: a laptop says within two minutes what a step takes on 128 chips of v5p, and with which collectives. Here it says
that the step fits twenty times over, and that specs of parameters alone are not enough: to get one layer of a stack
that is split over `fsdp`, the compiler gathers one of each device, 15 times the bytes that the shardings ask for.

Command: `compax plan --config=plan_7b`

Each stack of matrices is split over `fsdp` along its layers and over `model` along heads or hidden units, embedding and
head over both along the vocabulary (Xu et al., "GSPMD: General and Scalable Parallelization for ML Computation Graphs",
2021, arXiv 2105.04663; Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023, arXiv
2304.11277). Split over `fsdp` along the model's width instead, the compiler splits the residual stream along its width
too, and each device computes seven times its share: the report says so.

Measured on two cores that others used too, with libtpu 0.0.42.1, 2026-11: 62 s, and 110 s another time (86 s of
processors), 1.6 GB of memory.
"""

from __future__ import annotations

from compax.experiments import config as base


def get_config() -> base.Config:
    """Returns the config."""
    config = base.default()
    config.name = "plan_7b"
    config.pipeline = "cast(compute=bfloat16)"
    config.tokenizer.vocabulary = 32_000
    config.model.size = "llama2-7b"
    config.model.overrides = {"scan": True, "remat": True}
    config.data.sequence_length = 4096
    config.data.batch_size = 32
    config.plan.topology = "v5p:4x4x8"
    config.plan.mesh = "fsdp=32,model=4"
    config.sharding.batch = ("fsdp",)
    config.sharding.params = (
        "embed.embedding: model+fsdp,-",
        "head.kernel: -,model+fsdp",
        "blocks.attn.query.kernel: fsdp,-,model",
        "blocks.attn.key.kernel: fsdp,-,model",
        "blocks.attn.value.kernel: fsdp,-,model",
        "blocks.attn.out.kernel: fsdp,model,-",
        "blocks.mlp.gate.kernel: fsdp,-,model",
        "blocks.mlp.up.kernel: fsdp,-,model",
        "blocks.mlp.down.kernel: fsdp,model,-",
    )
    return config

"""How a pass becomes a gradient and a gradient a step: plain, DDP, DeepSpeed, FSDP2; evaluation and memory."""

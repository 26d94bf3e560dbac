"""What FlashAttention-3's scheduler metadata is, and how it is computed.

A `Problem` (problem.py) and an FA3 build's rules (builds.py, tiles.py) make a `LaunchPlan` (plan.py), pure Python;
the plan and the lengths make the rows (layout.py), by the Triton kernel (kernel.py) or the NumPy model
(reference.py). Nothing here imports the integration layer, and only kernel.py needs Triton and torch.
"""

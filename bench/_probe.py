import sys, importlib.util, re, time, os
sys.path.insert(0, '.'); sys.path.insert(0, '.gpu-kit/sglang-kernel-0.4.2')
import torch, triton
import triton.language as tl
from triton_kernels.builds import rules_for
from triton_kernels.plan import make_plan
from triton_kernels.problem import Problem
import triton_kernels.kernel as K
src = open('triton_kernels/kernel.py').read()
v = src.replace("q_heads_per_row, block_m, block_n,\n    num_splits", "q_heads_per_row, block_m: tl.constexpr, block_n: tl.constexpr,\n    num_splits").replace('"block_m", "block_n",','')
assert v != src
os.makedirs('triton_kernels', exist_ok=True); open('triton_kernels/_kv.py','w').write(v)
import triton_kernels._kv as KV
from sgl_kernel.flash_attn import get_scheduler_metadata as native
@triton.jit
def empty(p, q): pass
def graph_time(fn, n=40, reps=30):
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        fn(); fn()
        torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, stream=s):
            for _ in range(n): fn()
    ts = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    ts.sort(); return ts[len(ts)//2] / n * 1e3
x = torch.zeros(8, device='cuda')
print('empty', graph_time(lambda: empty[(1,)](x, x)), 'grid124', graph_time(lambda: empty[(124,)](x, x)))
rules = rules_for("sglang-kernel-0.4.2")
shape = None
def run(mod, p, plan, c, out):
    mod.triton_metadata(p, plan, c, None, None, None, None, out)
for causal in (False, True):
  for b in (1, 32, 128, 256, 512, 992, 8192):
    p = Problem(b, 1, 131072, 8, 1, 128, page_size=64, causal=causal, num_splits=32 if b <= 992 else 0)
    plan = make_plan(p, rules); c = torch.randint(1, 100000, (b,), device='cuda', dtype=torch.int32)
    out = torch.full((plan.layout.size,), -7, device='cuda', dtype=torch.int32)
    nat = native(b, 1, 131072, 8, 1, 128, c, page_size=64, causal=causal, num_splits=p.num_splits)
    tn = graph_time(lambda: native(b, 1, 131072, 8, 1, 128, c, page_size=64, causal=causal, num_splits=p.num_splits))
    res = []
    G = max(32, triton.next_power_of_2(min(b, 992)))
    for mod in (K, KV):
      for sl in (4, 8, 16, 32):
        for w in (1, 2, 4, 8):
          if causal and not (mod is K and w in (4, 8)): continue
          if G < 256 and w == 8: continue
          if G >= 512 and w == 1: continue
          mod.launch_shape = lambda *_: (sl, G, w)
          out.fill_(-7); run(mod, p, plan, c, out); torch.cuda.synchronize()
          ok = all(torch.equal(out[s], nat[s]) for s in plan.layout.rows.values()) and out[-1] == 0
          t = graph_time(lambda: run(mod, p, plan, c, out))
          res.append((t, 'const' if mod is KV else 'run', sl, w, ok))
    res.sort()
    print(f'causal={causal} b={b} native {tn:.2f}', 'bad' if not all(r[-1] for r in res) else 'ok', ' '.join(f'{m}/{s}/{w}:{t:.2f}' for t, m, s, w, _ in res[:5]), '| best run', next((f'{m}/{s}/{w}:{t:.2f}' for t, m, s, w, _ in res if m == 'run'), ''), flush=True)
mod = K
t0 = time.perf_counter()
for _ in range(1000): run(K, p, plan, c, out)
print('host us', (time.perf_counter() - t0) * 1e3)

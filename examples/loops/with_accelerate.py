"""A training loop of accelerate. The lines that end in `# fastnn` are all that changes."""

import torch
from accelerate import Accelerator
from torch import nn

import fastnn  # fastnn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
fastnn.convert(model)  # fastnn
print(fastnn.explain(model, torch.randn(8, 16)).counts())  # fastnn
torch.manual_seed(1)

data = torch.utils.data.TensorDataset(torch.randn(32, 16), torch.randint(4, (32,)))
loader = torch.utils.data.DataLoader(data, batch_size=8)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step {step}  loss {loss.item():.9g}")
print(sorted(accelerator.unwrap_model(model).state_dict()))

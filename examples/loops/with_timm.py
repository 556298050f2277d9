"""A model of timm, converted. The lines that end in `# fastnn` are all that changes.

The model is random, so nothing is downloaded.
"""

import timm
import torch

import fastnn  # fastnn

torch.manual_seed(0)
model = timm.create_model("resnet18", pretrained=False, num_classes=4)
fastnn.convert(model)  # fastnn
print(fastnn.explain(model, torch.randn(2, 3, 32, 32)).counts())  # fastnn
torch.manual_seed(1)

optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in range(2):
    x, y = torch.randn(4, 3, 32, 32), torch.randint(4, (4,))
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.9g}")
print(type(model.fc).__name__, len(model.state_dict()))

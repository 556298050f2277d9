"""Does what most programs do with torch.nn. With `import torch.nn as nn` it prints the same."""

import os
import tempfile

import torch

import fastnn as nn


class SimpleModel(nn.Module):
    def __init__(self, features=10, hidden=32, classes=2):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


class DeepModel(nn.Module):
    """A model with a ModuleList, used in a loop."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        return self.norm(x)


class AutoEncoder(nn.Module):
    """A model with a ModuleDict, used by name."""

    def __init__(self, features=12, code=3):
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "encoder": nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, code)),
                "decoder": nn.Sequential(nn.Linear(code, 8), nn.ReLU(), nn.Linear(8, features)),
            }
        )

    def forward(self, x):
        return self.parts["decoder"](self.parts["encoder"](x))


def count(model):
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total} parameters, {trainable} trainable"


def show(title, tensor):
    numbers = " ".join(f"{value:.9g}" for value in tensor.detach().cpu().flatten()[:4].tolist())
    print(f"{title}: {tuple(tensor.shape)} {numbers}")


def main():
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = SimpleModel().to(device)
    print(model)
    print(count(model))

    x = torch.randn(64, 10, device=device)
    target = (x.sum(1) > 0).long()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    for step in range(20):
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2} loss {loss.item():.9g}")

    model.eval()
    with torch.no_grad():
        logits = model(x)
    print(f"accuracy {(logits.argmax(1) == target).float().mean().item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        torch.save(model.state_dict(), path)
        restored = SimpleModel()
        print(restored.load_state_dict(torch.load(path, map_location="cpu")))
    with torch.no_grad():
        same = torch.allclose(restored.eval()(x.cpu()), logits.cpu(), atol=1e-6)
    print(f"restored on the CPU, same logits: {same}")

    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 5)).to(
        device
    )
    print(network)
    for name, parameter in network.named_parameters():
        print(f"{name}: {tuple(parameter.shape)}")
    for mode in (True, False):
        network.train(mode)
        show("Sequential, " + ("train" if mode else "eval"), network(x))

    deep = DeepModel().to(device)
    print(count(deep))
    for layer in deep.layers[1:].parameters():
        layer.requires_grad_(False)
    print(count(deep))
    show("ModuleList, train", deep(torch.randn(4, 16, device=device)))
    show("ModuleList, eval", deep.eval()(torch.randn(4, 16, device=device)))

    coder = AutoEncoder().to(device)
    print(list(coder.parts), list(coder.state_dict())[:2])
    sample = torch.randn(5, 12, device=device)
    show("code", coder.parts["encoder"](sample))
    loss = nn.functional.mse_loss(coder(sample), sample)
    loss.backward()
    show("gradient", coder.parts["encoder"][0].weight.grad)


if __name__ == "__main__":
    main()

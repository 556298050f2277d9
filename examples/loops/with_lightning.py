"""A LightningModule with its Trainer. The lines that end in `# fastnn` are all that changes."""

import lightning
import torch
from torch import nn

import fastnn  # fastnn


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))
        fastnn.convert(self.net)  # fastnn

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        print(f"step {index}  loss {loss.item():.9g}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
model = Classifier()
print(fastnn.explain(model.net, torch.randn(8, 16)).counts())  # fastnn
torch.manual_seed(1)
data = torch.utils.data.TensorDataset(torch.randn(32, 16), torch.randint(4, (32,)))
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="auto",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
print(sorted(model.state_dict()))

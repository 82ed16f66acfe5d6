"""Plain PyTorch: a linear map, top-k, a dense decoder, autograd and Adam."""

from measure import Measurement, parse, refuse

options = parse()

import torch
from torch import nn

if options.rule != "topk":
    refuse("the plain trainer has top-k only")
measurement = Measurement(options)


class Autoencoder(nn.Module):
    """Codes from `x - b_dec`, the k largest kept."""

    def __init__(self) -> None:
        super().__init__()
        atoms = nn.functional.normalize(torch.randn(options.n_latents, options.d_in), dim=1)
        self.W_dec = nn.Parameter(atoms)
        self.W_enc = self.W_dec if options.tied else nn.Parameter(atoms.clone())
        self.b_enc = nn.Parameter(torch.zeros(options.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(options.d_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        values, index = pre.topk(options.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(1, index, values) @ self.W_dec + self.b_dec


model = Autoencoder()
optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
for number, x in enumerate(measurement.batches(options.steps)):
    if number == 0:
        model.b_dec.data = x.mean(dim=0)
    (x - model(x)).square().sum(dim=-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.W_dec.div_(model.W_dec.norm(dim=1, keepdim=True))
measurement.report(torch.__version__, model, model.W_dec)

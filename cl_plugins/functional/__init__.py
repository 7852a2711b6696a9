"""Provisional, by the lead, until the metrics engineer replaces this file."""
import torch
def _t(m): return torch.as_tensor(m, dtype=torch.float64)
def average_accuracy(m, **k): m=_t(m); return m[-1,:len(m)].mean()
def average_incremental_accuracy(m, **k): m=_t(m); return torch.stack([m[i,:i+1].mean() for i in range(len(m))]).mean()
def learning_accuracy(m, **k): m=_t(m); return m.diagonal().mean()
def backward_transfer(m, **k): m=_t(m); return (m[-1]-m.diagonal())[:len(m)-1].mean() if m.shape[0]==m.shape[1] else (m[-1,:len(m)-1]-m.diagonal()[:len(m)-1]).mean()
def forgetting(m, **k):
    m=_t(m); n=len(m)
    return torch.stack([m[j:n-1,j].max()-m[-1,j] for j in range(n-1)]).mean() if n>1 else torch.tensor(torch.nan)

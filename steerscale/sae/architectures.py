"""All architectures by the name that `sae.architecture` gives them; a new one is one file and one line here."""

from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.batch_topk import BatchTopKSAE
from steerscale.sae.gated import GatedSAE
from steerscale.sae.jumprelu import JumpReLUSAE
from steerscale.sae.matryoshka import MatryoshkaSAE
from steerscale.sae.relu import ReLUSAE
from steerscale.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    "relu": ReLUSAE,
    "gated": GatedSAE,
    "topk": TopKSAE,
    "batch_topk": BatchTopKSAE,
    "jumprelu": JumpReLUSAE,
    "matryoshka": MatryoshkaSAE,
}

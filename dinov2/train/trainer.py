import torch
from torch import nn, Tensor
from dinov2.train.ssl_model import local_tensor
def clip_gradients(student, limit):
    norms={}
    for n,m in student.items():
        norms[n]=torch.nn.utils.clip_grad_norm_(m.parameters(), limit)
    return norms

"""mmchat: train, evaluate and chat with multimodal language models."""

from mmchat import torchvision_repair

torchvision_repair.install()

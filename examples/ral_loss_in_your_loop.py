"""The RAL loss in a plain PyTorch loop: a tiny random Qwen2.5-VL, LoRA, a real picture, offline."""

import torch
from peft import LoraConfig, get_peft_model
from skimage.data import astronaut
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import ral_kernels as rk

torch.manual_seed(0)
IMAGE, ROLLOUTS = 500, 8
text = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
text |= {"num_key_value_heads": 2, "intermediate_size": 128, "initializer_range": 0.1}
text |= {"bos_token_id": None, "eos_token_id": None}
text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
model = get_peft_model(Qwen2_5_VLForConditionalGeneration(config), lora)
batch = dict(Qwen2VLImageProcessorPil(max_pixels=224**2)(astronaut(), return_tensors="pt"))
prompt = [1, 2, *[IMAGE] * (int(batch["image_grid_thw"].prod()) // 4), 3, 4, 5]
batch = {name: x.repeat(ROLLOUTS, 1) for name, x in batch.items()}
ids = torch.tensor([prompt] * ROLLOUTS)
tokens = model.generate(input_ids=ids, **batch, max_new_tokens=16, do_sample=True)
answers, rows = tokens[:, len(prompt) :, None], slice(len(prompt) - 1, -1)  # rows: their queries
reward = (answers < 100).float().mean((1, 2))  # yours: is the answer right?
advantages = (reward - reward.mean()) / reward.std()
batch |= {"input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE).int()}
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(6):  # inner steps on the same rollouts: RAL acts from the second on
    with rk.capture(model, layers=-1, rows=rows) as captured:
        log_p = model(**batch).logits[:, rows].log_softmax(-1).gather(-1, answers)[..., 0]
    if step == 0:  # the policy that wrote the answers, and where it attended
        old_log_p, reference = log_p.detach(), captured.snapshot()
    grpo = -(advantages[:, None] * (log_p - old_log_p).exp()).mean()
    (grpo + 5.0 * captured.ral_loss(reference, advantages)).backward()
    print(f"step {step}: JSD {captured.divergence(reference).mean().item():.3g}")
    optimizer.step(), optimizer.zero_grad()

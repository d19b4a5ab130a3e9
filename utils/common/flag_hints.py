"""
What to give in place of flags that no script has: names of transformers 4, of other toolkits, and of other scripts.

Data only. utils/common/flags.py reads it once a flag is unknown, so a flag that a parser has is never looked up here.
Sources: the fields of TrainingArguments in transformers 4.20 to 4.57; the others are the usual flags of LLaMA-Factory,
ms-swift and ChatGLM's P-tuning, not compared with a version of theirs.
"""

# Flag -> the names it may have here; the script's own comes first, else the message names the script that has it.
RENAMED: dict[str, tuple[str, ...]] = {
    # transformers 4
    "evaluation_strategy": ("eval_strategy",),
    "no_cuda": ("use_cpu",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    # other toolkits, and what comes to mind
    **dict.fromkeys(("adapter", "adapters", "adapter_dir", "adapter_name_or_path", "ckpt_dir"), ("adapter_path",)),
    **dict.fromkeys(("lora_path", "lora_weights", "peft_model_id", "peft_path"), ("adapter_path",)),
    **dict.fromkeys(
        ("base_model", "base_model_name_or_path", "model_dir", "model_id", "model_id_or_path", "model_path"),
        ("model_name_or_path",),
    ),
    **dict.fromkeys(
        ("data_path", "dataset", "dataset_dir", "dataset_name", "train_data", "train_file", "file", "data_file"),
        ("dataset_path", "jsonl_path", "input", "input_path"),
    ),
    **dict.fromkeys(("eval_dataset", "val_dataset", "valid_file", "validation_file"), ("eval_dataset_path",)),
    **dict.fromkeys(("split_dataset_ratio", "test_size", "val_set_size", "val_size"), ("eval_fraction", "split")),
    **dict.fromkeys(
        (
            "block_size",
            "cutoff_len",
            "max_len",
            "max_length",
            "max_seq_len",
            "max_source_length",
            "max_target_length",
            "model_max_length",
            "seq_len",
            "seq_length",
        ),
        ("max_seq_length", "max_new_tokens"),
    ),  # fmt: skip
    **dict.fromkeys(("max_gen_length", "max_output_tokens", "max_tokens"), ("max_new_tokens",)),
    **dict.fromkeys(("lora_dim", "lora_r"), ("lora_rank",)),
    **dict.fromkeys(("lora_modules", "lora_target", "target_modules"), ("lora_target_modules",)),
    **dict.fromkeys(("batch_size", "micro_batch_size"), ("batch_size", "per_device_train_batch_size")),
    **dict.fromkeys(("epoch", "epochs", "num_epochs", "n_epochs"), ("num_train_epochs",)),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "neftune_alpha": ("neftune_noise_alpha",),
    "optimizer": ("optim",),
    "resume": ("resume_from_checkpoint",),
    "test_file": ("input_path",),
    "output": ("output_path", "output_dir", "save_path"),
    "output_dir": ("output_dir", "output_path", "save_path"),
    "output_file": ("output_path",),
    "save_dir": ("save_path", "output_dir"),
    **dict.fromkeys(("chat_template", "prompt_format", "template_type"), ("template",)),
    **dict.fromkeys(("dataset_num_proc", "num_workers", "preprocessing_num_workers"), ("num_proc",)),
    **dict.fromkeys(("max_samples", "max_train_samples", "num_samples"), ("max_rows",)),
    **dict.fromkeys(("mp_size", "tensor_parallel_size", "tp"), ("tp_size",)),
    **dict.fromkeys(("server_name", "server_host"), ("host",)),
    "server_port": ("port",),
}

_GROUPED = "rows of like length are batched together by default: leave it out (--train_sampling_strategy random: not)"
_HUB = "nothing leaves this machine: leave it out, and upload the finished adapter (hf upload)"
_LORA = "LoRA is the only method here: leave it out"
_PRECISION = "give --bf16 or --fp16"
_QUANTIZE = "give --quantize int8 or --quantize int4"
_UNUSED = "nothing here uses it: leave it out"
# Flag -> what to do; {value} is what was given with it.
ADVICE: dict[str, str] = {
    # transformers 4
    "adafactor": "give --optim adafactor",
    "dispatch_batches": """give --accelerator_config '{{"dispatch_batches": true}}'""",
    "fp16_backend": "give --fp16 alone",
    "fp16_opt_level": "give --fp16 alone",
    "fsdp_min_num_params": "give --fsdp_config, or accelerate launch --config_file configs/accelerate_fsdp2.yaml",
    "fsdp_transformer_layer_cls_to_wrap": "accelerate launch --config_file configs/accelerate_fsdp2.yaml brings it",
    "group_by_length": _GROUPED,
    "half_precision_backend": "give --fp16 or --bf16 alone",
    "include_inputs_for_metrics": _UNUSED,
    "include_tokens_per_second": "tokens per second are always logged: leave it out",
    "jit_mode_eval": _UNUSED,
    "logging_dir": "logs go to --output_dir: leave it out",
    "mp_parameters": _UNUSED,
    "overwrite_output_dir": "leave it out: a new run moves the checkpoints of an older one to previous-1/",
    "past_index": _UNUSED,
    **dict.fromkeys(("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"), _HUB),
    "ray_scope": _UNUSED,
    "save_safetensors": "adapters are always written as safetensors: leave it out",
    "sharded_ddp": "give --deepspeed ds_config_zero3.json",
    "split_batches": """give --accelerator_config '{{"split_batches": true}}'""",
    "torchdynamo": "give --compile_layers true",
    **dict.fromkeys(("tpu_metrics_debug", "tpu_num_cores", "use_ipex", "use_mps_device", "xpu_backend"), _UNUSED),
    "use_legacy_prediction_loop": _UNUSED,
    "warmup_ratio": "give --warmup_steps {value}: below 1 it is a share of all steps",
    # LLaMA-Factory, ms-swift
    **dict.fromkeys(("finetuning_type", "stage", "train_type", "tuner_type", "use_lora", "peft_type"), _LORA),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quant_bits", "quantization_bit"), _QUANTIZE),
    **dict.fromkeys(("attn_impl", "flash_attn", "use_flash_attn"), "attention is fused where it can be: leave it out"),
    **dict.fromkeys(("dtype", "precision", "torch_dtype"), _PRECISION),
    "overwrite_cache": "rows are tokenised again when they or the flags change: leave it out",
    "plot_loss": "the curves are always drawn: leave it out",
    "trust_remote_code": "no code of a checkpoint is run: leave it out",
    # P-tuning of ChatGLM, other scripts for it
    **dict.fromkeys(("pre_seq_len", "prefix_projection", "ptuning_checkpoint"), _LORA),
    **dict.fromkeys(("history_column", "response_column"), "give --columns prompt=NAME,response=NAME when tokenising"),
    "prompt_column": "give --columns prompt=NAME,response=NAME when tokenising",
    "predict_with_generate": "chatglm_milti_gpu_inference.py and tools/evaluate.py make answers",
    # batch inference
    "do_sample": "a --temperature above 0 samples",
    "gpu_memory_utilization": "give --batch_size, or nothing: the batch fills the memory that is free",
    **dict.fromkeys(("beam_size", "num_beams"), "beams are not searched: leave it out"),
}

# Script -> flags that only it has, or that are best known from it; first match wins.
FLAGS_OF_SCRIPTS: dict[str, tuple[str, ...]] = {
    "process_belle_1M_data.py": ("dedup", "shuffle", "split", "max_rows"),
    "tokenize_dataset_rows_belle.py": (
        "jsonl_path", "save_path", "max_seq_length", "skip_overlength", "loss_on", "columns", "strict", "num_proc",
        "preview", "template",
    ),
    "multi_gpu_fintune_belle.py": (
        "dataset_path", "eval_dataset_path", "eval_fraction", "packing", "pack_tokens", "quantize", "compile_layers",
        "plan", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "learning_rate",
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "deepspeed", "output_dir", "save_steps", "save_total_limit", "logging_steps", "eval_steps", "eval_strategy",
        "lr_scheduler_type", "optim", "warmup_steps", "weight_decay", "gradient_checkpointing", "report_to",
        "resume_from_checkpoint", "use_cpu", "neftune_noise_alpha",
    ),
    "chatglm_milti_gpu_inference.py": (
        "adapter_path", "input_path", "output_path", "max_new_tokens", "temperature", "top_k",
        "top_p", "repetition_penalty", "num_return_sequences", "stop_strings", "merge_and_save", "batch_size",
        "prompt_column", "prompt_template", "overwrite", "max_memory", "offload_folder", "allow_base_mismatch",
    ),
    "chatglm_deepspeed_inference.py": ("tp_size",),
    "tools/chat.py": ("web", "host", "port"),
    "tools/evaluate.py": ("samples",),
}  # fmt: skip

"""A CPU platform for verl 0.9.1, through verl's own registries. Loaded only inside verl's processes.

Three of verl's plug-in points carry it: `VERL_USE_EXTERNAL_MODULES` loads `platform` in every process,
`actor_rollout_ref.model.external_lib` loads `engine` in the training workers, and vLLM's `worker_extension_cls` names
`vllm_worker.CpuWorkerExtension`. No file of verl, vLLM or torch is edited.
"""

"""Start one `mixcl` command on several machines: this one, hosts behind ssh, SLURM, Kubernetes or Ray.

What was looked at: TorchX 0.7 writes heterogeneous SLURM jobs without `--signal`, account or GPUs per node, requeues
any failure alike and asks `sacct`; submitit pickles what it runs and keeps the ranks' signals to itself; DeepSpeed's
runner needs pdsh and loses variables; NeMo-Run builds on TorchX. So each machine's processes are torchrun's, or srun's
own, whose variables a run reads, and what is written here is the few lines that hand them to a scheduler.
"""

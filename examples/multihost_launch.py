"""How multihost.py finds the other processes, or starts some on this machine."""

import os
import socket
import subprocess
import sys
import time

import jax


def launch(count):
    """Starts this program on this machine once per process, without accelerators."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen([*command, str(i)], env=env) for i in range(count)]
    try:
        # The first failure ends the others, because they would wait for it.
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return int(any(codes))


def start(coordinator, num_processes, process_id):
    """Connects the processes, before anything asks JAX for devices."""
    if num_processes and not coordinator:
        sys.exit(launch(num_processes))
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        try:
            jax.distributed.initialize()
        except ValueError:
            print("JAX finds no cluster: one process.", flush=True)

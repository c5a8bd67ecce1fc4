"""The tasks that Celery runs in the benchmark. Started as a program it puts one message of each into a list of its own,
as patterns for more."""
import os
import subprocess

import celery

app = celery.Celery("celery_tasks", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
gate, done = (os.open(os.environ[name], os.O_RDWR) for name in ("BENCH_GATE", "BENCH_DONE"))


@app.task
def hold():
    os.read(gate, 1)


@app.task
def run(data):
    subprocess.run(["true"], capture_output=True, check=True)
    os.write(done, b".")  # the quickest way to tell


if __name__ == "__main__":
    with app.connection_for_write() as connection:
        hold.apply_async(connection=connection, queue="pattern-hold")
        run.apply_async([os.environ["BENCH_DATA"]], connection=connection, queue="pattern-run")

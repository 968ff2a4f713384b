"""Runs in a task's container: downloads inputs, runs the command, uploads outputs."""

import json
import os
import subprocess
import sys

import boto3
from botocore.config import Config

moved = json.loads(sys.argv[1])
s3 = boto3.client(
    "s3",
    aws_access_key_id=os.environ.pop("STEP_ACCESS_KEY"),
    aws_secret_access_key=os.environ.pop("STEP_SECRET_KEY"),
    config=Config(s3={"addressing_style": "path"}),
)
for path in moved["inputs"]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    s3.download_file(moved["bucket"], moved["prefix"] + path, path)
done = subprocess.run(sys.argv[2:], check=False)
for path in moved["outputs"]:
    if os.path.isfile(path):
        s3.upload_file(path, moved["bucket"], moved["prefix"] + path)
sys.exit(done.returncode)

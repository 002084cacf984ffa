"""The JobSet: the fields that the API demands, and that its numbers and names agree. No cluster is asked."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from jepa_scale.config.loading import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""RFC 1123 label, which names of jobs, containers and volumes must be."""


@pytest.fixture
def jobset():
    return yaml.safe_load((REPOSITORY / "scripts/k8s/jobset.yaml").read_text())


@pytest.fixture
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated


@pytest.fixture
def pod(job):
    return job["template"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


@pytest.fixture
def variables(container):
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_what_the_api_demands(jobset, job, pod, container):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    names = [jobset["metadata"]["name"], job["name"], container["name"], *(v["name"] for v in pod["volumes"])]
    assert all(NAME.fullmatch(name) for name in names)
    assert container["image"] and pod["restartPolicy"] in ("Never", "OnFailure")  # a Job's pods may have no other
    assert all(isinstance(v.get("value", ""), str) for v in container["env"]), "values of variables must be strings"
    mounts = container["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    assert all(mount["mountPath"].startswith("/") for mount in mounts)


def test_numbers_agree(job, container, variables):
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"  # pods without an index have no host names
    assert spec["parallelism"] == spec["completions"] == int(variables["NNODES"])
    assert job["replicas"] == 1
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["NPROC_PER_NODE"]


def test_the_endpoint_is_the_first_pod(jobset, job, container, variables):
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    port = container["ports"][0]["containerPort"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert variables["RDZV_ENDPOINT"] == f"{name}-{job['name']}-0-0.{subdomain}:{port}"


def test_its_command_is_one_of_this_repository(container, variables):
    (script,) = container["command"]
    assert os.access(REPOSITORY / script, os.X_OK)
    text = (REPOSITORY / script).read_text()
    assert all(f"${{{name}:-" in text or f"${{{name}:+" in text for name in variables), "a variable nobody reads"
    flag, config, *overrides = container["args"]
    assert flag == "--config" and load_config(REPOSITORY / config, overrides).run.dir == "/shared/runs"

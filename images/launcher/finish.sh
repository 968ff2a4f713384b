# The step that starts a training job and watches it. Its client of Kubernetes has 700 modules: byte
# code of them costs 16 MB and spares the step a second of every start. Argument: the folder of
# packages.
set -eu
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$1/kubernetes"
python3 -c "import kubernetes.client, kubernetes.config, kubernetes.watch"

# The stages that load models: torch, transformers, TRL. Byte code is made here, since the root of a
# running container is read-only, and without it every step would compile torch's again. It is
# valid whatever the time stamps of its sources. One file of torch is for Python 3.12 alone.
# Argument: the folder of packages.
set -eu
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -x py312_intrinsics "$1"

# The stages whose engine is vLLM. Triton compiles a launcher for each of its kernels in the running
# container, so this base has a C compiler, from Debian as of the build: unlike the other bases, it
# is not the same, byte for byte, when it is built again. Byte code is made here, as for the models.
# Argument: the folder of packages.
set -eu
apt-get -q update
apt-get -q install --yes --no-install-recommends gcc libc6-dev
rm -rf /var/lib/apt/lists /var/cache/apt /var/log/apt /var/log/dpkg.log
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -x py312_intrinsics "$1" || true

# The stages that need no torch. pyarrow's Flight and S3 clients, its headers and tests go; no stage
# uses them. Half of the environment is compiled code; byte code of the rest would cost 34 MB and
# spare a step less than a second, so there is none. Argument: the folder of packages.
set -eu
rm -r "$1"/pyarrow/include "$1"/pyarrow/tests "$1"/pyarrow/*_flight* "$1"/pyarrow/libarrow_s3* \
    "$1"/pyarrow/_s3fs*
python3 -c "import pyarrow.parquet"

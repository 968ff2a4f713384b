module srccore/tests/cluster/tools/probe

go 1.25.0

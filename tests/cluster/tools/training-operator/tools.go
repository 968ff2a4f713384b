//go:build tools

// Package tools pins the programs of this folder: see ../../build.py.
package tools

import (
	_ "github.com/kubeflow/training-operator/cmd/training-operator.v1"
)

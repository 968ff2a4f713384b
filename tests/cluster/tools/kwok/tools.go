//go:build tools

// Package tools pins the programs of this folder: see ../../build.py.
package tools

import (
	_ "sigs.k8s.io/kwok/cmd/kwok"
)

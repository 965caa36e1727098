package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/nftcni/nftcni/ipam"
)

// wrong reports a network configuration that cannot be used: code 7. The message names
// the field and the remedy.
func wrong(format string, args ...any) *types.Error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

// badEnv reports an environment variable of the call: code 4.
func badEnv(format string, args ...any) *types.Error {
	return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf(format, args...), "")
}

// tryLater reports what may be better in a moment: code 11.
func tryLater(format string, args ...any) *types.Error {
	return types.NewError(types.ErrTryAgainLater, fmt.Sprintf(format, args...), "")
}

// asCNI gives any error the code of the CNI specification (section 5) that fits it.
func asCNI(err error) *types.Error {
	var (
		done        *types.Error
		agent       *Error
		full        *ipam.FullError
		owned       *ipam.OwnedError
		unavailable *ipam.UnavailableError
		path        *fs.PathError
	)
	switch code := uint(types.ErrInternal); {
	case errors.As(err, &done):
		return done
	case errors.As(err, &agent):
		if agent.Code != 0 {
			code = agent.Code
		}
		return types.NewError(code, err.Error(), "")
	case errors.Is(err, ErrNoAgent), errors.Is(err, errAgentBusy), errors.Is(err, context.DeadlineExceeded), errors.As(err, &full):
		return tryLater("%v", err)
	case errors.As(err, &owned):
		return badEnv("CNI_CONTAINERID, CNI_IFNAME: %v", err)
	case errors.As(err, &unavailable):
		return wrong("runtimeConfig.ips: %v", err)
	case errors.As(err, &path):
		return types.NewError(types.ErrIOFailure, err.Error(), "")
	default:
		return types.NewError(code, err.Error(), "")
	}
}

// printError writes the error result of the CNI specification, section 5.
func printError(w io.Writer, cniVersion string, e *types.Error) error {
	b, err := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion,omitempty"`
		*types.Error
	}{cniVersion, e}, "", "    ")
	if err != nil {
		return fmt.Errorf("encode error result: %w", err)
	}
	if _, err := w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write error result: %w", err)
	}
	return nil
}

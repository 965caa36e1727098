package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
)

type waitFlags struct {
	generation int64
	timeout    time.Duration
	deleted    bool
	read       apiFlags
}

func (s *session) waitCommand() *cobra.Command {
	var fl waitFlags
	cmd := &cobra.Command{
		Use:   "wait policy NAMESPACE/NAME",
		Short: "Return when the kernel on this node enforces a policy",
		Long: "Return when the kernel on this node enforces a generation of a policy (metadata.generation):\n" +
			"that of --generation, else the one that a fresh read of the API server returns (the agent\n" +
			"asks it; with --kubeconfig this command does). Policies from manifests count none.\n" +
			"Without an agent nothing can come into force: it answers at once whether the kernel's table\n" +
			"still is what the agent's last snapshot says and holds that generation.\n\n" +
			"Exit status 1: the time is over, or no agent runs and the generation is not in force.",
		Example: "  nftcni debug wait policy shop/db\n  nftcni debug wait policy shop/db --generation 3 --timeout 10s\n" +
			"  nftcni debug wait policy shop/db --kubeconfig /etc/nftcni/kubeconfig\n  nftcni debug wait policy shop/db --deleted",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: s.completePolicies,
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] != "policy" {
				return fmt.Errorf("%q: it can wait for a policy only: wait policy NAMESPACE/NAME", args[0])
			}
			if namespace, name, _ := strings.Cut(args[1], "/"); namespace == "" || name == "" {
				return fmt.Errorf("policy %q: it takes NAMESPACE/NAME (nftcni debug policies lists them)", args[1])
			}
			e, err := s.wait(cmd.Context(), args[1], fl, noticeTo(cmd))
			if err != nil {
				return err
			}
			return s.print(cmd, e, func(w io.Writer) error { return writeEnforced(w, e, fl.deleted) })
		},
	}
	f := cmd.Flags()
	f.Int64Var(&fl.generation, "generation", 0, "metadata.generation to wait for; 0: the API server's")
	f.DurationVar(&fl.timeout, "timeout", 30*time.Second, "give up after this long")
	f.BoolVar(&fl.deleted, "deleted", false, "return when the policy is no longer enforced instead")
	fl.read.register(f)
	return cmd
}

func writeEnforced(w io.Writer, e agent.Enforced, deleted bool) error {
	if deleted {
		_, err := fmt.Fprintf(w, "policy %s is not in force on this node\n", e.Policy)
		return err
	}
	_, err := fmt.Fprintf(w, "policy %s generation %d is in force since %s (kernel generation %d, %d us after the event)\n",
		e.Policy, e.Generation, e.At.UTC().Format(time.RFC3339Nano), e.KernelGeneration, e.Micros)
	return err
}

func (s *session) wait(ctx context.Context, name string, fl waitFlags, notice func(string)) (agent.Enforced, error) {
	ctx, cancel := context.WithTimeout(ctx, fl.timeout)
	defer cancel()
	want := fl.generation
	if want == 0 && fl.read != (apiFlags{}) && !fl.deleted {
		var err error
		if want, err = fl.read.generation(ctx, name); err != nil {
			return agent.Enforced{}, err
		}
	}
	q := url.Values{"policy": {name}, "generation": {strconv.FormatInt(want, 10)}}
	if fl.deleted {
		q.Set("gone", "1")
	}
	var e agent.Enforced
	for ; ; q.Set("wait", "1") { // the first answer comes at once: it is what is said when the time is over
		got := agent.Enforced{}
		err := s.get(ctx, agent.PathEnforced+"?"+q.Encode(), &got)
		if ctx.Err() != nil {
			return e, fmt.Errorf("waiting %v for policy %s: %s (nftcni debug status says whether the agent follows)", fl.timeout, name, waitState(e))
		}
		if errors.Is(err, errNoAgent) {
			return s.stillEnforced(ctx, name, want, fl.deleted, err, notice)
		}
		if err != nil {
			return e, err
		}
		e, want = got, max(want, got.Wanted)
		q.Set("generation", strconv.FormatInt(want, 10))
		q.Del("fresh")
		if e.InForce && e.Generation >= want && !fl.deleted || fl.deleted && !e.InForce && !e.Known {
			return e, nil
		}
	}
}

// stillEnforced answers without an agent: the snapshot file says what was put in force,
// and the kernel's table must be what a compilation of it gives.
func (s *session) stillEnforced(ctx context.Context, name string, want int64, deleted bool, noAgent error, notice func(string)) (agent.Enforced, error) {
	e := agent.Enforced{Policy: name}
	snap, err := s.left(noAgent, notice)
	if err != nil {
		return e, err
	}
	for _, x := range snap.Enforced {
		if x.Policy == name {
			e = x
		}
	}
	v, err := verifySnapshot(ctx, snap)
	if err == nil && !v.Equal { // elements that nothing needs may be left over
		v.probe(snap, v.have, 0, rand.New(rand.NewPCG(1, 0)))
	}
	switch {
	case err != nil:
		return e, fmt.Errorf("%w; and the kernel's table cannot be read: %w", noAgent, err)
	case v.Rules != "" || v.WrongCount > 0:
		return e, fmt.Errorf("%w; and the kernel's table decides otherwise than its last snapshot says (nftcni debug verify)", noAgent)
	case deleted && e.InForce:
		return e, fmt.Errorf("%w; the kernel enforces policy %s until an agent runs", noAgent, name)
	case !deleted && !e.InForce:
		return e, fmt.Errorf("%w; the last one enforced no policy %s", noAgent, name)
	case !deleted && e.Generation < want:
		return e, fmt.Errorf("%w; the kernel enforces generation %d of policy %s, not %d, until an agent runs", noAgent, e.Generation, name, want)
	}
	return e, nil
}

func waitState(e agent.Enforced) string {
	switch {
	case e.InForce:
		return "generation " + strconv.FormatInt(e.Generation, 10) + " is in force"
	case e.Known:
		return "the agent knows it but the kernel has not taken it"
	}
	return "the agent knows no such policy"
}

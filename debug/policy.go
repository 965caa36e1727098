package debug

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// NewPolicyCommand returns `nftcni policy`: the policy engine without any node.
func NewPolicyCommand() *cobra.Command {
	s := &session{}
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Render, explain and test policies from manifests, without a node",
		Long: "Render, explain and test policies from manifests, without a node, root or a cluster.\n\n" +
			"Pods of manifests have no addresses; each gets one of each family from its node's\n" +
			"podCIDRs, or from 100.64.0.0/10 and fd00:6440::/64.",
		PersistentPreRunE: s.prepare,
	}
	cmd.PersistentFlags().StringVarP(&s.format, "output", "o", "table", "table, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(s.renderCommand(), s.explainCommand(), s.testCommand())
	return Group(cmd)
}

// requireFilename makes -f a flag that must be given.
func requireFilename(cmd *cobra.Command, into *string) {
	cmd.Flags().StringVarP(into, "filename", "f", "", "manifests: a file or a directory")
	_ = cmd.MarkFlagRequired("filename") // the flag exists
}

// rendered is one element of the tables.
type rendered struct {
	Set     string `json:"set"`
	Element string `json:"element"`
	Value   string `json:"value,omitempty"`
	Comment string `json:"comment,omitempty"`
}

func (s *session) renderCommand() *cobra.Command {
	var files, node string
	var ruleset bool
	cmd := &cobra.Command{
		Use:   "render -f DIR",
		Short: "Print the table elements that policies compile to on one node",
		Long: "Print the table elements that policies compile to on one node. The rules never change\n" +
			"and are printed with --ruleset.",
		Example: "  nftcni policy render -f ./manifests\n  nftcni policy render -f ./manifests --node worker-1 -o json\n  nftcni policy render --ruleset -f ./manifests",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ruleset {
				_, err := io.WriteString(cmd.OutOrStdout(), nft.Program())
				return err
			}
			c, err := loadManifests(files, noticeTo(cmd))
			if err != nil {
				return err
			}
			rows := render(policy.Compile(onNode(c, node), cmp.Or(node, everyNode)))
			return s.print(cmd, rows, func(w io.Writer) error { return writeRendered(w, rows) })
		},
	}
	requireFilename(cmd, &files)
	cmd.Flags().StringVar(&node, "node", "", "the node; default: every pod counts as local")
	cmd.Flags().BoolVar(&ruleset, "ruleset", false, "print the constant rules instead")
	return cmd
}

const everyNode = "every node"

// onNode is c itself, or with node empty c with every pod on one node.
func onNode(c *policy.Cluster, node string) *policy.Cluster {
	if node != "" {
		return c
	}
	all := *c
	all.Pods = slices.Clone(c.Pods)
	for i := range all.Pods {
		all.Pods[i].Node = everyNode
	}
	return &all
}

func render(c *policy.Compiled) []rendered {
	rows := make([]rendered, 0, len(c.Tables))
	for k, v := range c.Tables {
		r := rendered{Set: nft.ElementSet(k), Element: elementText(k), Comment: c.Comments[k]}
		if k.Map != policy.IsolatedIngress && k.Map != policy.IsolatedEgress {
			r.Value = valueText(k.Map, v)
		}
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b rendered) int {
		return cmp.Or(cmp.Compare(a.Set, b.Set), cmp.Compare(a.Element, b.Element))
	})
	return rows
}

func elementText(k policy.Key) string {
	port := func() string {
		return portText(policy.PortMatch{Protocol: k.Protocol, First: k.First, Last: max(k.First, k.Last)})
	}
	switch k.Map {
	case policy.NetID:
		return k.Addr.String() + "-" + k.To.String()
	case policy.Access:
		return fmt.Sprintf("%#x . %#x", k.X, k.Y)
	case policy.AccessOthers, policy.AccessRest:
		return fmt.Sprintf("%#x", k.X)
	case policy.AccessPort, policy.AccessRange:
		return fmt.Sprintf("%#x . %s", k.X, port())
	}
	return k.Addr.String()
}

func valueText(m policy.Map, v uint32) string {
	switch m {
	case policy.AccessPort, policy.AccessRange, policy.AccessRest:
		if int(v) < 5 && v > 0 {
			return [...]string{"", "allow", "deny", "allow and log", "deny and log"}[v]
		}
		return strconv.Itoa(int(v))
	}
	return fmt.Sprintf("%#x", v)
}

func writeRendered(w io.Writer, rows []rendered) error {
	t := &table{header: []string{"SET", "ELEMENT", "VALUE", "COMMENT"}}
	for _, r := range rows {
		t.add(r.Set, r.Element, orDash(r.Value), orDash(r.Comment))
	}
	return t.write(w)
}

func (s *session) explainCommand() *cobra.Command {
	var files string
	var all bool
	cmd := &cobra.Command{
		Use:     "explain -f DIR SRC DST PROTO/PORT",
		Short:   "Say whether SRC may reach DST by the policies of manifests, and why",
		Long:    "Say whether SRC may reach DST by the policies of manifests, and why. SRC and DST are\nnamespace/pod, a pod's name, an address, world, or namespace/label=value[,label=value].",
		Example: "  nftcni policy explain -f ./manifests shop/web data/redis TCP/6379\n  nftcni policy explain -f ./manifests shop/app=web,tier=front data/redis TCP/6379 --all",
		Args:    cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := loadManifests(files, noticeTo(cmd))
			if err != nil {
				return err
			}
			for _, arg := range args[:2] {
				if c, err = withInvented(c, arg); err != nil {
					return err
				}
			}
			q, err := newQuestion(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			answers, err := q.answers(cmd.Context(), agent.Snapshot{Cluster: c}, kernel{})
			if err != nil {
				return err
			}
			return s.print(cmd, answers, func(w io.Writer) error { return writeAnswers(w, answers, all) })
		},
	}
	requireFilename(cmd, &files)
	cmd.Flags().BoolVar(&all, "all", false, "every rule that was considered, and why it did not match")
	return cmd
}

// checkManifestsAsIs is checkManifests without addresses for pods: for objects that are
// laid over a cluster.
func checkManifestsAsIs(path string, notice func(string)) (*policy.Cluster, error) {
	c, problems, err := k8s.LoadDir(path)
	if err != nil {
		return nil, err
	}
	for _, p := range problems {
		notice(p.String())
	}
	return c, describeProblems(problemCount(problems))
}

// checkManifests is the CI gate's view of problems: what is refused fails.
func checkManifests(path string, notice func(string)) (*policy.Cluster, error) {
	c, err := checkManifestsAsIs(path, notice)
	if c != nil {
		assignAddresses(c)
	}
	return c, err
}

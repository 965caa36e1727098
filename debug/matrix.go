package debug

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

// picture is who may talk to whom, by workload.
type picture struct {
	Workloads []pictureEnd `json:"workloads"`
	Pairs     []pair       `json:"pairs"`
}

type pictureEnd struct {
	Name      string   `json:"name"`
	Namespace string   `json:"namespace,omitempty"`
	Pods      []string `json:"pods,omitempty"`
}

func newPicture(c *policy.Cluster, namespace string) picture {
	list := workloads(c)
	if namespace != "" {
		list = inNamespace(list, namespace)
	}
	p := picture{Pairs: newAccess(c, list, spans(c)).pairs()}
	for _, w := range list {
		end := pictureEnd{Name: w.name, Namespace: w.group}
		for _, n := range w.pods {
			end.Pods = append(end.Pods, n.Name)
		}
		p.Workloads = append(p.Workloads, end)
	}
	return p
}

func inNamespace(list []workload, namespace string) []workload {
	var out []workload
	for _, w := range list {
		if w.group == namespace || w.group == "" {
			out = append(out, w)
		}
	}
	return out
}

// pictureSource is the flags that say which cluster is shown.
type pictureSource struct{ files, namespace string }

func (p *pictureSource) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&p.files, "filename", "f", "", "manifests (a file or a directory) instead of this node's agent")
	cmd.Flags().StringVarP(&p.namespace, "namespace", "n", "", "only this namespace and what is outside of the cluster")
}

func (p *pictureSource) load(cmd *cobra.Command, s *session) (picture, error) {
	var snap agent.Snapshot
	var err error
	if p.files != "" {
		snap.Cluster, err = loadManifests(p.files, noticeTo(cmd))
	} else {
		snap, err = s.snapshot(cmd.Context(), noticeTo(cmd))
	}
	if err != nil {
		return picture{}, err
	}
	pic := newPicture(snap.Cluster, p.namespace)
	if p.namespace != "" && len(pic.Pairs) == 0 {
		return pic, fmt.Errorf("namespace %q has no pods with addresses", p.namespace)
	}
	return pic, nil
}

func (s *session) matrixCommand() *cobra.Command {
	var from pictureSource
	cmd := &cobra.Command{
		Use:   "matrix",
		Short: "Show who may talk to whom, by workload, as a table",
		Long: "Show who may talk to whom, by workload, as a table: rows are sources, columns are\n" +
			"destinations. Pods of one namespace with the same labels are one workload (labels that\n" +
			"controllers add for every revision are left out unless a policy names them). ipBlocks\n" +
			"that policies name stand beside world, each for an address in it. A pod's own node\n" +
			"always reaches it and is not shown.",
		Example: "  nftcni debug matrix\n  nftcni debug matrix -n shop\n  nftcni debug matrix -f ./manifests -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := from.load(cmd, s)
			if err != nil {
				return err
			}
			return s.print(cmd, p, p.matrix)
		},
	}
	from.flags(cmd)
	return cmd
}

// matrix prints numbered columns, cells of one sign, and a legend of the services.
func (p picture) matrix(w io.Writer) error {
	t := &table{header: []string{"", "FROM \\ TO"}}
	for i := range p.Workloads {
		t.header = append(t.header, strconv.Itoa(i+1))
	}
	cells := make([]string, len(p.Workloads)*len(p.Workloads))
	legend, order := map[string]string{"all": "+", "none": "-"}, []string{}
	for _, e := range p.Pairs {
		sign := legend[e.Services]
		if sign == "" {
			sign = letter(len(order))
			legend[e.Services] = sign
			order = append(order, e.Services)
		}
		cells[e.from*len(p.Workloads)+e.to] = sign
	}
	for i, end := range p.Workloads {
		row := make([]string, 0, len(t.header))
		row = append(row, strconv.Itoa(i+1), endLabel(end))
		for _, cell := range cells[i*len(p.Workloads):][:len(p.Workloads)] {
			row = append(row, cmp.Or(cell, "."))
		}
		t.rows = append(t.rows, row)
	}
	if err := t.write(w); err != nil {
		return err
	}
	fmt.Fprintln(w, "\n+  everything    -  nothing    .  not asked")
	for _, services := range order {
		fmt.Fprintf(w, "%s  %s\n", legend[services], services)
	}
	return nil
}

// letter is a, b, ... z, aa, ab, ...
func letter(i int) string {
	if i < 26 {
		return string(rune('a' + i))
	}
	return letter(i/26-1) + string(rune('a'+i%26))
}

func endLabel(e pictureEnd) string {
	if len(e.Pods) > 1 {
		return fmt.Sprintf("%s (%d pods)", e.Name, len(e.Pods))
	}
	return e.Name
}

func (s *session) graphCommand() *cobra.Command {
	var from pictureSource
	var format string
	var all bool
	cmd := &cobra.Command{
		Use:   "graph",
		Short: "Draw who may talk to whom, by workload",
		Long: "Draw who may talk to whom, by workload, for a review. An arrow is what policy lets\n" +
			"through. Pairs of which no policy selects either end are open by default and are only\n" +
			"drawn with --all.",
		Example: "  nftcni debug graph > who.svg\n  nftcni debug graph --format mermaid -n shop\n  nftcni debug graph -f ./manifests --format dot | dot -Tpng > who.png",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			draw := map[string]func(picture, io.Writer) error{"svg": picture.svg, "dot": picture.dot, "mermaid": picture.mermaid}[format]
			if draw == nil {
				return fmt.Errorf("flag --format is %q: it takes svg, dot or mermaid", format)
			}
			p, err := from.load(cmd, s)
			if err != nil {
				return err
			}
			p.Pairs = p.drawn(all)
			if s.format != "table" {
				return s.print(cmd, p, nil)
			}
			return draw(p, cmd.OutOrStdout())
		},
	}
	from.flags(cmd)
	cmd.Flags().StringVar(&format, "format", "svg", "svg, dot or mermaid")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]cobra.Completion{"svg", "dot", "mermaid"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().BoolVar(&all, "all", false, "pairs without any policy too")
	return cmd
}

// drawn are the pairs worth an arrow.
func (p picture) drawn(all bool) []pair {
	out := []pair{}
	for _, e := range p.Pairs {
		if e.Services != "none" && (all || e.Restricted) {
			out = append(out, e)
		}
	}
	return out
}

// diagram is a text format of a graph as the formats of its lines: a group gets its number
// and name, a node its number and label, an edge its ends and label.
type diagram struct{ open, group, node, endGroup, edge, end string }

func (p picture) dot(w io.Writer) error {
	return p.text(w, diagram{
		open:  "digraph policy {\n\trankdir=LR;\n\tnode [shape=box, style=rounded, fontname=\"sans-serif\"];\n\tedge [fontname=\"sans-serif\", fontsize=10];\n",
		group: "\tsubgraph cluster_%d {\n\t\tlabel=%q;\n", node: "\t\tn%d [label=%q];\n", endGroup: "\t}\n",
		edge: "\tn%[1]d -> n%[2]d [label=%[3]q];\n", end: "}\n",
	})
}

func (p picture) mermaid(w io.Writer) error {
	return p.text(w, diagram{
		open: "flowchart LR\n", group: "  subgraph g%d[%q]\n", node: "    n%d[%q]\n", endGroup: "  end\n",
		edge: "  n%[1]d -->|%[3]q| n%[2]d\n",
	})
}

func (p picture) text(w io.Writer, d diagram) error {
	var b strings.Builder
	b.WriteString(d.open)
	for i, group := range p.groups() {
		if group != "" {
			fmt.Fprintf(&b, d.group, i, group)
		}
		for n, e := range p.Workloads {
			if e.Namespace == group {
				fmt.Fprintf(&b, d.node, n, endLabel(e))
			}
		}
		if group != "" {
			b.WriteString(d.endGroup)
		}
	}
	for _, e := range p.Pairs {
		fmt.Fprintf(&b, d.edge, e.from, e.to, e.Services)
	}
	b.WriteString(d.end)
	_, err := io.WriteString(w, b.String())
	return err
}

// groups are the namespaces in order, then "" for what is outside.
func (p picture) groups() []string {
	var out []string
	for _, e := range p.Workloads {
		if len(out) == 0 || out[len(out)-1] != e.Namespace {
			out = append(out, e.Namespace)
		}
	}
	return out
}

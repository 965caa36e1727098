package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// everyCommand lists the commands that help shows, the root with them.
func everyCommand() []*cobra.Command {
	var all []*cobra.Command
	var add func(*cobra.Command)
	add = func(c *cobra.Command) {
		all = append(all, c)
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() {
				add(sub)
			}
		}
	}
	root := newRootCommand()
	root.InitDefaultCompletionCmd()
	add(root)
	return all
}

// TestManPages: every command has a page, of nothing but the macros that we mean to write,
// that the formatter takes without a warning.
func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if code := commandLine("nftcni", []string{"man", dir}); code != 0 {
		t.Fatalf("nftcni man: exit status %d", code)
	}
	macro := regexp.MustCompile(`^\.(TH|SH|B|BR|TP|nf|fi)( |$)`)
	groff, _ := exec.LookPath("groff") // without it the pages are only looked at here
	for _, c := range everyCommand() {
		name := filepath.Join(dir, manPageName(c)+".1")
		page, err := os.ReadFile(name)
		if err != nil {
			t.Error(err)
			continue
		}
		for line := range strings.Lines(string(page)) {
			if strings.HasPrefix(line, ".") && !macro.MatchString(strings.TrimSpace(line)) || strings.HasPrefix(line, "'") {
				t.Errorf("%s: the formatter takes %q for a request", name, line)
			}
		}
		for _, want := range []string{".TH ", ".SH NAME\n" + roff(manPageName(c)) + ` \- `, ".SH SYNOPSIS\n", ".SH DESCRIPTION\n"} {
			if !bytes.Contains(page, []byte(want)) {
				t.Errorf("%s lacks %q", name, want)
			}
		}
		if c.Example != "" && !bytes.Contains(page, []byte(".SH EXAMPLES\n")) {
			t.Errorf("%s lacks the examples", name)
		}
		if groff == "" {
			continue
		}
		out, err := exec.CommandContext(t.Context(), groff, "-man", "-ww", "-z", "-Tutf8", name).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("groff: %v\n%s", err, out)
		}
	}
}

// TestExamples parses every example in help as the command line would: its command, flags
// and arguments exist. Every command that does something has an example.
func TestExamples(t *testing.T) {
	for _, c := range everyCommand() {
		generated := strings.HasPrefix(c.CommandPath(), "nftcni completion ")
		if c.Runnable() && c.Example == "" && !generated && c.Name() != "help" && !c.HasSubCommands() {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			if err := parses(line); err != nil {
				t.Errorf("help of %s: %q: %v", c.CommandPath(), line, err)
			} else if !strings.Contains(line, c.CommandPath()) && c.Name() != "agent" {
				t.Errorf("help of %s: the example %q is of another command", c.CommandPath(), line)
			}
		}
	}
}

// TestDocumentedCommands does it to the commands that the documents show, in blocks of code
// and in running text.
func TestDocumentedCommands(t *testing.T) {
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	inText := regexp.MustCompile("`((?:sudo )?nftcni [a-z][^`]*)`|(?m:^(?:    |[$#] |sudo )((?:sudo )?(?:bin/)?nftcni [a-z].*)$)")
	schematic := regexp.MustCompile(`[\[|<]|\.\.\.|\b[A-Z]{4,}\b`) // "why SRC ...", "svg|dot": not a command as it would be typed
	found := 0
	for _, file := range append(files, "README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range inText.FindAllStringSubmatch(string(text), -1) {
			line := m[1] + m[2]
			if m[1] != "" && (schematic.MatchString(line) || len(strings.Fields(line)) == 2) {
				continue // or a command's name
			}
			found++
			if err := parses(line); err != nil && !(m[1] != "" && strings.HasSuffix(err.Error(), "received 0")) {
				t.Errorf("%s: %q: %v", file, line, err)
			}
		}
	}
	if found < 5 {
		t.Errorf("%d commands were found in the documents", found)
	}
}

// shellWord is a word of a shell line, as far as examples need one.
var shellWord = regexp.MustCompile(`'[^']*'|"[^"]*"|[^\s'"]+`)

// parses reports what the command line would refuse of the first command of a shell line.
func parses(line string) error {
	line, _, _ = strings.Cut(line, "  #")
	_, line, found := strings.Cut(line, "nftcni ")
	if !found {
		return errors.New("it does not name nftcni")
	}
	var words []string
	for _, w := range shellWord.FindAllString(line, -1) {
		if slices.Contains([]string{"|", ">", ">>", "&", "&&", ";", "<", "2>&1"}, w) {
			break
		}
		words = append(words, strings.Trim(w, `'"`))
	}
	root := newRootCommand()
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	cmd, rest, err := root.Find(words)
	if err != nil {
		return err
	}
	cmd.InitDefaultHelpFlag()
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	if !cmd.Runnable() && len(rest) > 0 {
		return errors.New("no such command below " + cmd.CommandPath())
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}

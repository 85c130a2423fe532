package hotdesk

import "regexp"

// Route is what to do about texts that match a regular expression.
type Route struct {
	pattern *regexp.Regexp
	do      func(match []string) (Decision, error)
}

// On calls the function with the match and its groups.
func On(pattern string, do func(match []string) (Decision, error)) Route {
	return Route{regexp.MustCompile(pattern), do}
}

// When decides the same each time.
func When(pattern string, decision Decision) Route {
	return On(pattern, func([]string) (Decision, error) { return decision, nil })
}

// Routes is a Respond or a Before: the first route whose pattern is in the turn's text decides, else Next.
func Routes(routes ...Route) func(Turn) (Decision, error) {
	return func(turn Turn) (Decision, error) {
		for _, route := range routes {
			if match := route.pattern.FindStringSubmatch(turn.Text); match != nil {
				return route.do(match)
			}
		}
		return Next, nil
	}
}

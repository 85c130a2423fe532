package hotdesk

import (
	"errors"
	"strconv"
)

// Number is a State: a whole number from 0 to 2147483647.
type Number int

// Export gives the number.
func (n *Number) Export() string { return n.String() }

// Import takes the number of the generation before.
func (n *Number) Import(state, _ string) error {
	value, err := strconv.ParseUint(state, 10, 31)
	if err != nil {
		return errors.New("state is not a number")
	}
	*n = Number(value)
	return nil
}

func (n *Number) String() string { return strconv.Itoa(int(*n)) }

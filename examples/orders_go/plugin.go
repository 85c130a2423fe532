// Orders: answers what became of an order, masks words, and hands over to a person who is asked for.
package main

import (
	"errors"

	"hotdesk"
)

const number = `{"type":"object","properties":{"number":{"type":"string"}},"required":["number"]}`

var (
	status   = map[string]string{"1001": "shipped", "1002": "packed", "1003": "damn late"}
	mask     hotdesk.Masker
	answered hotdesk.Number
)

func init() {
	hotdesk.Serve(hotdesk.Plugin{
		Configure: func(config string) error { return hotdesk.Texts(config, "words", &mask.Words) },
		State:     &answered,
		Before: hotdesk.Routes(
			hotdesk.When("human", hotdesk.HandOver("asked for a human", "A person will be with you shortly.")),
			hotdesk.When("spam", hotdesk.Drop("spam")),
			hotdesk.On("(?s)^say (.*)", say)),
		After:     mask.After,
		Transform: mask.Transform,
		Respond: hotdesk.Routes(
			hotdesk.On("order ([0-9]+)", tell),
			hotdesk.On("count", count),
			hotdesk.On("secret", secret),
			hotdesk.On("fail", fail),
			hotdesk.On("trap", func([]string) (hotdesk.Decision, error) { panic("told to trap") })),
		Tools: []hotdesk.Tool{
			{Name: "order_status", Description: "What became of an order.", Parameters: number, Call: orderStatus}},
	})
}

func main() {} // never called; Go wants one

func say(match []string) (hotdesk.Decision, error) { return hotdesk.Rewrite(match[1]), nil }

func tell(match []string) (hotdesk.Decision, error) {
	answered++
	found, known := status[match[1]]
	if !known {
		return hotdesk.Answer("There is no order " + match[1] + "."), nil
	}
	return hotdesk.Answer(found + "."), hotdesk.Emit("Order ", match[1], " is ")
}

func count([]string) (hotdesk.Decision, error) {
	return hotdesk.Answer("Answered " + answered.String() + "."), nil
}

func secret([]string) (hotdesk.Decision, error) {
	var refused *hotdesk.Refused
	if _, _, err := hotdesk.KVGet("secret"); errors.As(err, &refused) && refused.Kind == "denied" {
		return hotdesk.Answer("Denied: " + refused.Text + "."), nil
	}
	return hotdesk.Answer("Not denied."), nil
}

func fail([]string) (hotdesk.Decision, error) { return hotdesk.Next, errors.New("told to fail") }

func orderStatus(arguments string) (string, error) {
	asked := hotdesk.Text(arguments, "number")
	if found, known := status[asked]; known {
		return hotdesk.Object("number", asked, "status", found), nil
	}
	return "", errors.New("no order " + asked)
}

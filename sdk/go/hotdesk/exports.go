package hotdesk

import (
	"errors"
	"unsafe"
)

//go:wasmexport hotdesk:plugin/middleware@1.0.0#before
func before(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32,
	p3 unsafe.Pointer, n3 uint32) unsafe.Pointer {
	return asked(plugin.Before, Turn{text(p0, n0), text(p1, n1), text(p2, n2), text(p3, n3)})
}

//go:wasmexport hotdesk:plugin/middleware@1.0.0#after
func after(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32,
	p3 unsafe.Pointer, n3 uint32, p4 unsafe.Pointer, n4 uint32, p5 unsafe.Pointer, n5 uint32) unsafe.Pointer {
	defer explain()
	begin()
	if plugin.After == nil {
		return ok(0)
	}
	turn := Turn{text(p0, n0), text(p1, n1), text(p2, n2), text(p3, n3)}
	return decided(plugin.After(turn, Reply{text(p4, n4), text(p5, n5)}))
}

//go:wasmexport hotdesk:plugin/chunks@1.0.0#transform
func transform(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32,
	p3 unsafe.Pointer, n3 uint32, p4 unsafe.Pointer, n4 uint32, last uint32) unsafe.Pointer {
	defer explain()
	begin()
	if plugin.Transform == nil {
		return ok(fields(text(p4, n4), "")...)
	}
	turn := Turn{text(p0, n0), text(p1, n1), text(p2, n2), text(p3, n3)}
	shown, held, err := plugin.Transform(turn, text(p4, n4), last != 0)
	return okOr(err, fields(shown, held)...)
}

//go:wasmexport hotdesk:plugin/bot@1.0.0#respond
func respond(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32,
	p3 unsafe.Pointer, n3 uint32) unsafe.Pointer {
	return asked(plugin.Respond, Turn{text(p0, n0), text(p1, n1), text(p2, n2), text(p3, n3)})
}

// asked is an export that decides about a turn and gets nothing else.
func asked(do func(Turn) (Decision, error), turn Turn) unsafe.Pointer {
	defer explain()
	begin()
	if do == nil {
		return ok(0)
	}
	return decided(do(turn))
}

func decided(decision Decision, err error) unsafe.Pointer {
	return okOr(err, append([]uint32{decision.tag}, fields(decision.texts...)...)...)
}

//go:wasmexport hotdesk:plugin/tools@1.0.0#list-tools
func listTools() unsafe.Pointer {
	defer explain()
	begin()
	var words []uint32
	for _, tool := range plugin.Tools {
		words = append(words, fields(tool.Name, tool.Description, tool.Parameters, tool.Extra)...)
	}
	two := listOf(words, len(plugin.Tools))
	return result(two[0], two[1])
}

//go:wasmexport hotdesk:plugin/tools@1.0.0#call-tool
func callTool(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32) unsafe.Pointer {
	defer explain()
	begin()
	for _, tool := range plugin.Tools {
		if tool.Name == text(p0, n0) {
			result, err := tool.Call(text(p1, n1))
			return okOr(err, fields(result)...)
		}
	}
	return failed(errors.New("no tool " + text(p0, n0)))
}

//go:wasmexport hotdesk:plugin/intake@1.0.0#receive
func receive(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32,
	p3 unsafe.Pointer, n3 uint32, p4 unsafe.Pointer, n4 uint32, p5 unsafe.Pointer, n5 uint32) unsafe.Pointer {
	defer explain()
	begin()
	if plugin.Receive == nil {
		return failed(errors.New("this plugin takes no webhooks"))
	}
	request := Request{text(p0, n0), text(p1, n1), text(p2, n2), text(p3, n3), text(p4, n4), text(p5, n5)}
	messages, answer, err := plugin.Receive(request)
	var words []uint32
	for _, message := range messages {
		words = append(words, fields(message.Conversation, message.Text, message.ID, message.Extra)...)
	}
	words = append(listOf(words, len(messages)), uint32(answer.Status))
	return okOr(err, append(words, fields(answer.Headers, answer.Body, answer.Extra)...)...)
}

//go:wasmexport hotdesk:plugin/delivery@1.0.0#deliver
func deliver(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32, p2 unsafe.Pointer, n2 uint32) unsafe.Pointer {
	defer explain()
	begin()
	if plugin.Deliver == nil {
		return ok()
	}
	return okOr(plugin.Deliver(text(p0, n0), Reply{text(p1, n1), text(p2, n2)}))
}

//go:wasmexport hotdesk:plugin/events@1.0.0#on-event
func onEvent(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32) {
	defer explain()
	begin()
	if plugin.OnEvent != nil {
		plugin.OnEvent(text(p0, n0), text(p1, n1))
	}
}

//go:wasmexport hotdesk:plugin/lifecycle@1.0.0#setup
func setup(p0 unsafe.Pointer, n0 uint32) unsafe.Pointer {
	defer explain()
	begin()
	_, err := take(text(p0, n0))
	return okOr(err)
}

//go:wasmexport hotdesk:plugin/lifecycle@1.0.0#configure
func configure(p0 unsafe.Pointer, n0 uint32) unsafe.Pointer {
	defer explain()
	begin()
	taken, err := take(text(p0, n0))
	return okOr(err, taken)
}

// take offers the config to the plugin and gives 1 if it took it, 0 if it wants to be loaded anew.
func take(config string) (uint32, error) {
	if plugin.Configure == nil {
		return 0, nil
	}
	err := plugin.Configure(config)
	if errors.Is(err, LoadAnew) {
		return 0, nil
	}
	return 1, err
}

//go:wasmexport hotdesk:plugin/lifecycle@1.0.0#probe
func probe() unsafe.Pointer {
	defer explain()
	begin()
	if plugin.Probe == nil {
		return ok()
	}
	return okOr(plugin.Probe())
}

//go:wasmexport hotdesk:plugin/lifecycle@1.0.0#export-state
func exportState() unsafe.Pointer {
	defer explain()
	begin()
	if plugin.State == nil {
		return result(0)
	}
	return result(1, fields(plugin.State.Export())...)
}

//go:wasmexport hotdesk:plugin/lifecycle@1.0.0#import-state
func importState(p0 unsafe.Pointer, n0 uint32, p1 unsafe.Pointer, n1 uint32) unsafe.Pointer {
	defer explain()
	begin()
	if plugin.State == nil {
		return ok()
	}
	return okOr(plugin.State.Import(text(p0, n0), text(p1, n1)))
}

package wuerstchen

// #include <wuerstchen.h>
import "C"

import "unsafe"

// TrainTokenizer learns a tokenizer of vocabulary tokens, 514 at least, from
// texts, and writes tokenizer.json into a folder.
func TrainTokenizer(texts []string, vocabulary int, folder string) error {
	size, err := cUint32("vocabulary", vocabulary)
	if err != nil {
		return err
	}
	return withStrings("texts", texts, func(texts []*C.char) error {
		return withStrings("folder", []string{folder}, func(paths []*C.char) error {
			var cError *C.wst_error
			status := C.wst_tokenizer_train(unsafe.SliceData(texts), C.size_t(len(texts)), size, paths[0], &cError)
			return check(status, &cError)
		})
	})
}

// CreateModel makes a model with fresh weights of the configurations in a
// folder, which may also hold the weights of some parts.
func CreateModel(configs, folder string, seed uint64) error {
	return withStrings("path", []string{configs, folder}, func(paths []*C.char) error {
		var cError *C.wst_error
		return check(C.wst_model_create(paths[0], paths[1], C.uint64_t(seed), &cError), &cError)
	})
}

// MergeAdapter writes a model folder with the updates of an adapter, times a
// scale, added to Stage C's weights.
func MergeAdapter(model, adapter string, scale float32, out string) error {
	return withStrings("path", []string{model, adapter, out}, func(paths []*C.char) error {
		var cError *C.wst_error
		return check(C.wst_model_merge_adapter(paths[0], paths[1], C.float(scale), paths[2], &cError), &cError)
	})
}

// withStrings lends copies of texts to C.
func withStrings(name string, texts []string, work func([]*C.char) error) error {
	copies := make([]*C.char, 0, len(texts))
	defer func() {
		for _, each := range copies {
			freeString(each)
		}
	}()
	for _, text := range texts {
		copied, err := cString(name, text)
		if err != nil {
			return err
		}
		copies = append(copies, copied)
	}
	return work(copies)
}

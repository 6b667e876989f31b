"""The one-step models that two-phase training has to beat: linear classifiers on word counts."""

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C: the inverse of the regularisation, chosen on validation


class NBSVM:
  """Linear SVM on naive-Bayes features (Wang and Manning 2012, section 2.3), two classes.

  Binary counts of words and word pairs are scaled by their log-count ratio r; the weights of the
  SVM are interpolated with their mean magnitude by beta = 0.25, as published.
  """

  def __init__(self, strength: float, beta: float = 0.25):
    self.strength, self.beta = strength, beta

  def fit(self, texts, labels):
    self.words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+|[^\w\s]")
    x, y = self.words.fit_transform(texts), np.asarray(labels)
    ratio = [np.asarray(x[y == side].sum(0)).ravel() + 1.0 for side in (1, 0)]
    self.r = np.log(ratio[0] / ratio[0].sum()) - np.log(ratio[1] / ratio[1].sum())
    svm = LinearSVC(C=self.strength).fit(x.multiply(self.r).tocsr(), y)
    weights = svm.coef_[0]
    self.weights = (1 - self.beta) * np.abs(weights).mean() + self.beta * weights
    self.bias = svm.intercept_[0] * self.beta
    return self

  def predict(self, texts):
    scores = self.words.transform(texts).multiply(self.r).tocsr() @ self.weights + self.bias
    return (scores > 0).astype(int)


def tfidf_lr(strength: float):
  """Logistic regression on TF-IDF of words and word pairs."""
  return make_pipeline(
    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
    LogisticRegression(C=strength, max_iter=1000),
  )


MODELS = {"tfidf_lr": tfidf_lr, "nbsvm": NBSVM}


def accuracy(name: str, strength: float, train, held_out) -> float:
  """Accuracy on held_out of a model trained on train; both are (texts, 0/1 labels)."""
  model = MODELS[name](strength).fit(*train)
  return float((model.predict(held_out[0]) == held_out[1]).mean())
